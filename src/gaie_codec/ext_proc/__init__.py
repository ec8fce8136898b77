"""The ext_proc shim."""
