"""From a corpus and a machine to a first configuration of a run, with a reason for each choice (``nystrom init``)."""
