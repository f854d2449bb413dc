// What `engine.js` of the built page offers: the worker imports it, and so can Node.
export * from "./engine/bpe"
export * from "./engine/chat"
export * from "./engine/gpt2"
export * from "./engine/matmul"
export * from "./engine/safetensors"
export * from "./engine/sampling"
export * from "./random"
