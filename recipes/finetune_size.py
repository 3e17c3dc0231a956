"""Heals one size of an OFA checkpoint: trains a LoRA for it, or all weights of its extracted subnet.

    accelerate launch recipes/finetune_size.py --pretrained_model_name_or_path OFA_DIR --size 0.5 --lora_rank 16 \
        --train_data_dir IMAGES --output_dir OFA_DIR

puts the LoRA into `OFA_DIR/unet/ofa_adapters/0.5`, beside weights that stay what they are: setting that size activates
it, extracting that size merges it, no other size sees it. Without `--lora_rank`, `--output_dir` becomes a plain
pipeline folder of the subnet, as `recipes/extract.py` makes one, trained further. The checkpoint at full size teaches.
Takes what the compress recipes make, UNets and transformers. `ofadiff heal` is the same.
"""

from ofadiff.commands.command import main, script
from ofadiff.commands.heal import heal

if __name__ == "__main__":
    main(script(heal, __file__))
