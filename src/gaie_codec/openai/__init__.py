"""The OpenAI HTTP API: one module an endpoint, bodies <-> the neutral vocabulary."""
