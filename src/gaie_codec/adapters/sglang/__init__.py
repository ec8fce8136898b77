"""The dialects of SGLang."""
