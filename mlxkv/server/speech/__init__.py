"""Speech to text: OpenAI's POST /v1/audio/transcriptions."""
