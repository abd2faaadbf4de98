// Logits of every position through transformers.js: node transformers_js_client.mjs DIRECTORY tokens.json logits.f32
import { readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname } from 'node:path'
import { AutoModelForCausalLM, Tensor, env } from '@huggingface/transformers'

const [directory, tokensFile, logitsFile] = process.argv.slice(2)
env.allowRemoteModels = false
env.localModelPath = dirname(directory)

const tokens = JSON.parse(readFileSync(tokensFile, 'utf8'))
const ids = new Tensor('int64', BigInt64Array.from(tokens, BigInt), [1, tokens.length])
const mask = new Tensor('int64', BigInt64Array.from(tokens, () => 1n), [1, tokens.length])

// No options: what to load, and that the weights lie in a second file, stands in the directory's config.json.
const model = await AutoModelForCausalLM.from_pretrained(basename(directory))
const { logits } = await model({ input_ids: ids, attention_mask: mask })
const values = logits.type === 'float32' ? logits.data : logits.to('float32').data
writeFileSync(logitsFile, Buffer.from(values.buffer, values.byteOffset, values.byteLength))
