"""What openai-harmony renders, recorded and live."""
