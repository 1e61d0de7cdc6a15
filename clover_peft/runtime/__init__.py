"""Every special case of a foreign runtime (peft, accelerate, DeepSpeed, FSDP, bitsandbytes, torch's tracers).

This room knows nothing about the method, but for its name, under which `peft_registry` registers it, and imports no
other room.
"""
