"""What can be made of an adapter: a comparison, an evaluation, a merged model, a GGUF file, a hub repository."""
