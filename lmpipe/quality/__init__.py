"""What codecs do to a model: how far its answers move, and where bits matter most. Needs torch and transformers.

`lmpipe quality` and `lmpipe calibrate` run `python -m lmpipe.quality JOB`, so that no other command loads torch.
"""
