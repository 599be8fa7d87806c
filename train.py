"""Train a backbone through its ranking: accelerate launch train.py RECIPE.yaml [--option value ...]"""

from functools import partial

from transformers import set_seed

from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.baselines import LINEAR, measure_baselines
from modeling_bpgcn.training.building import build_model, build_processor
from modeling_bpgcn.training.data import load_image_data
from modeling_bpgcn.training.images import image_transform
from modeling_bpgcn.training.report import own_results, write_report
from modeling_bpgcn.training.run_folder import checkpoint_bytes, prepare_run, read_settings
from modeling_bpgcn.training.trainer import BPGCNTrainer


def main() -> None:
    """Parse, load, train, evaluate, save, push."""
    arguments = model_arguments, data_arguments, training = parse_arguments()
    set_seed(training.seed)
    with training.main_process_first(desc="loading the data and claiming the output folder"):
        processor, patch_size = build_processor(model_arguments, data_arguments.image_size)
        data = load_image_data(data_arguments, minimum_size=patch_size)
        model = build_model(model_arguments, training, data.label_names)
        needed = checkpoint_bytes(model, training)
        resume = training.resume_from_checkpoint or prepare_run(training.output_dir, arguments, needed)

    transform = image_transform(processor)
    trainer = BPGCNTrainer(
        model,
        training,
        train_dataset=data.train.with_transform(image_transform(processor, data_arguments.augmentation)),
        support_dataset=data.train.with_transform(transform),
        eval_dataset=(data.validation or data.test).with_transform(transform),
        processing_class=processor,
    )
    test = data.test.with_transform(transform)
    build_linear = partial(build_model, model_arguments, training, data.label_names, **LINEAR)
    results = measure_baselines(trainer, test, training.baselines, build_linear)
    set_seed(training.seed)  # whether baselines were measured must not change the run
    trainer.train(resume_from_checkpoint=resume)
    results += own_results(trainer.evaluate(test, metric_key_prefix="test"))
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_report(
            trainer, data, data_arguments, results, transform, read_settings(arguments), model_arguments.backbone
        )
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
