// Run a packed ONNX file in Node: `npm install onnxruntime-node`, then
//   node run.mjs model.onnx 1x3x224x224 [input.bin]
// Prints the outputs as JSON, name -> list of numbers. input.bin holds float32 numbers; without it the input is zeros.
import { readFileSync } from "node:fs";
import { InferenceSession, Tensor } from "onnxruntime-node";

const [path, size, input] = process.argv.slice(2);
const shape = size.split("x").map(Number);
const count = shape.reduce((a, b) => a * b, 1);
const bytes = input ? readFileSync(input) : new Uint8Array(4 * count);
const numbers = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + 4 * count));

const session = await InferenceSession.create(path); // leave graph optimisation on: it unpacks the weights once, here
const outputs = await session.run({ [session.inputNames[0]]: new Tensor("float32", numbers, shape) });
const plain = Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, Array.from(tensor.data)]));
console.log(JSON.stringify(plain));
