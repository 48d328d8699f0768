"""Scoring with a package that `em3 export` wrote.

Nothing in here imports the training code: `torchrec_em3.serving.scorer` needs torch, fbgemm_gpu, safetensors, numpy and
pyarrow, and the service fastapi, uvicorn and prometheus_client besides.
"""
