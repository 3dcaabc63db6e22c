"""One file a command: its flags, the call of the library, and what it prints."""
