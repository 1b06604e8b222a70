"""Pictures and sound in a terminal: attached, dropped, recorded, transcribed."""
