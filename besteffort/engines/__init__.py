"""Model servers that answer over HTTP: started here with vLLM, or attached to by URL."""
