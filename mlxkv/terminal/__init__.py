"""What a person sees: console, chat, one answer, local and remote backends."""
