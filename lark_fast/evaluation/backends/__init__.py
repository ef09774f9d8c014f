"""Programs that let a model answer, behind one signature: vLLM, SGLang, Transformers."""
