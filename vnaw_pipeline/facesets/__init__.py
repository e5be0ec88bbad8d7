"""Static expression data: FERPlus, RAF-DB and AffectNet as their owners ship them, mapped into the eight expressions.

What lies at a path says which set it is; any one of them is enough.

    FERPlus    <name>.npz                                    `image`, `name`, `votes`, `fer2013_label`; no splits
               fer2013new.csv, FER2013Train|Valid|Test/      votes and PNGs, the folders also in `data/` or `images/`
               fer2013.csv                                   Kaggle's labels and pixels, alone or beside fer2013new.csv
    RAF-DB     list_patition_label.txt, Image/aligned/       the list also in `EmoLabel/`, both also in `basic/`
    AffectNet  <name>.csv                                    image path and code a row; no splits
               training.csv, validation.csv                  also in `Manually_Annotated_file_lists/`
               annotations/<id>_exp.npy, images/<id>.jpg     also in `train_set/` and `val_set/`
"""
