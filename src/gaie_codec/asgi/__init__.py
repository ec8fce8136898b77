"""The ASGI shim: an OpenAI-compatible HTTP server before one model server. `app` is the application, `server` runs it with uvicorn."""
