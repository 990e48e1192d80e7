"""The server that `ysnake.serve` starts.

`server` listens, `application` has the routes, `service` holds the model and a queue for each
request. `ollama_api` and `openai_api` are the two APIs. `fields`, `chat` and `embeddings` read what
both have in common. `guard` refuses clients without permission, `connections` ends those that send
half a request, and `error_log` limits the log.
"""
