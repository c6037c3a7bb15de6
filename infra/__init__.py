"""Where the pipeline runs and where things lie: stores, datasets and manifests, Ray and Prefect connections."""
