"""LoRA and its kin: any spelling of them, on weights of any format, with nothing merged."""
