"""What reading a prompt costs with each KV memory (`sink-eval latency --prefill`)."""
