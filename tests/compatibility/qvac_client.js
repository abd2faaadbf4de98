// Greedy text through QVAC Fabric on the CPU: bare qvac_client.js model.gguf prompt tokens [adapter.gguf]
// Prints one JSON line: {"text": ...}. Its package exposes no logits, so text is all that can be compared.
const LlmLlamacpp = require('@qvac/llm-llamacpp')

async function main ([path, prompt, tokens, lora]) {
  const config = {
    device: 'cpu', gpu_layers: '0', ctx_size: '256', predict: tokens, seed: '1',
    temp: '0', top_k: '1', repeat_penalty: '1.0', ...(lora && { lora })
  }
  const model = new LlmLlamacpp({ files: { model: [path] }, config, logger: null, opts: {} })
  await model.load()
  const response = await model.run([{ role: 'user', content: prompt }])
  let text = ''
  await response.onUpdate(piece => { text += piece }).await()
  console.log(JSON.stringify({ text }))
  await model.unload()
}

main(Bare.argv.slice(2))
