"""`python -m vnaw_pipeline`: the same commands as `vnaw`, for `accelerate launch -m vnaw_pipeline ...`."""

from vnaw_pipeline.cli import main

if __name__ == "__main__":
    main()
