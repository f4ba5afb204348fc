class LoRARequest:
    lora_name: str
    lora_path: str
    load_inplace: bool
    @property
    def adapter_id(self) -> int: ...
