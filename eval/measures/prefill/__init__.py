"""Time and memory for reading a prompt with each KV memory (`sink-eval latency --prefill`)."""
