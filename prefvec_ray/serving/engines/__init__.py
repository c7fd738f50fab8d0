"""The engines that generate: one protocol, the slot engine and vLLM."""
