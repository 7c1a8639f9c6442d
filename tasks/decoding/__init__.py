"""From untrusted bytes to pixels at the model's scale: disposable child processes, file headers, and damage."""
