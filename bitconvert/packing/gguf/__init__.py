"""The GGUF container: parameters, vocabulary, tensor names and the writer."""
