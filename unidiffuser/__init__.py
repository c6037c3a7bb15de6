"""UniDiffuser: the model and its mathematics, usable without the rest of the pipeline.

One transformer (U-ViT) predicts the noise of every modality at once, each modality with a timestep of its own
(Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", arXiv 2303.06555). A timestep
of 0 means that the modality is given, 1000 that it is marginalised out, so one network holds the marginal, the
conditional and the joint distributions.
"""
