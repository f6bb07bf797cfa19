"""fastmtp: faster decoding of an open-weight LLM with its own multi-token-prediction head."""
