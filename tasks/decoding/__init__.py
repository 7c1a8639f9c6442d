"""From untrusted bytes to pixels: decoding in a disposable process, and what tells damage."""
