"""Transcripts: where a recording is cut, what the model is asked, how the texts are joined."""
