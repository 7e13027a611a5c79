"""Distillation: a model learns the distributions of another one, the teacher, at the targets of the data (Hinton et al.
2015, arXiv:1503.02531; Kim & Rush 2016, arXiv:1606.07947).

`teacher` is the seam: `Teacher.outputs` gives what is known of the teacher's distributions for a micro-batch, and the
loss (`divergences`, `head`) does not know where they come from.
"""
