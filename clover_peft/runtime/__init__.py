"""Every special case of a foreign runtime (peft, accelerate, DeepSpeed, FSDP, bitsandbytes, torch's tracers).

This room knows nothing about CLOVER and imports no other room.
"""
