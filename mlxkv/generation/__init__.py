"""One answer: request, session, prefill, decoder, reader, context shift."""
