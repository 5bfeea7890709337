# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Settings of trainings with adapters and quantized bases."""

ADAPTERS = {"none": {}, "lora": {"use_peft": True}, "dora": {"use_peft": True, "use_dora": True}}
QUANTIZED = {"none": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}
LORA = {"use_peft": True, "lora_r": 2, "learning_rate": 1e-2}
QLORA = {**LORA, "load_in_4bit": True}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
DECODER_LINEARS = {f"model.language_model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}
