// The live page: a text of the reader's own, read by the chat server.
