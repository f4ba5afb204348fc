# What lmpipe uses of vLLM 0.32, for the type checker: vLLM is not installed where it runs. tests/vllm holds the real
# classes against this.
__version__: str
