"""lmpipe keeps the KV cache of LLM inference engines alive outside the engine."""
