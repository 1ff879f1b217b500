"""The page of `dpm-scales studio`: processes, schedules, samples and edits in a browser. Gradio is an extra."""
