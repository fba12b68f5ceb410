//! One decoder for the Llama family and Qwen; knows no HTTP, no request, no training.
