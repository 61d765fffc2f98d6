"""Release: a checkpoint in Hugging Face form, and weights of such a form as the start of a new run."""
