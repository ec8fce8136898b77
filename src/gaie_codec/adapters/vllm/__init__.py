"""The dialects of vLLM."""
