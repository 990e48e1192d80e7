"""From files to tokens and back: documents, tokenizers, training windows, plain prose."""
