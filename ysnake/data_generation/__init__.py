"""A corpus that a language model in Ollama writes: questions, answers, files."""
