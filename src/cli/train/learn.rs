//! The course of a run: update by update, saving and measuring on the way, until its end or a signal.

use candle_core::DType;

use super::evaluation::{Answerer, Evaluation};
use super::held_out::HeldOutPacks;
use super::options::{SaveDtype, TrainFlags};
use super::report::Report;
use super::stop::Stop;
use crate::cartridge::{Cartridge, Provenance};
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::train::{RunDir, Trainer};

/// What a run needs besides its trainer.
pub struct Course<'a> {
    pub runtime: &'a Runtime,
    pub flags: &'a TrainFlags,
    pub run_dir: &'a RunDir,
    pub facts: Provenance,
    pub questions: Option<Evaluation>,
    pub held_out: Option<HeldOutPacks>,
}

impl Course<'_> {
    /// Trains to the end.
    ///
    /// # Errors
    /// [`CliError::Stopped`] after a signal: the running update is finished and saved.
    pub fn run(&self, trainer: &mut Trainer) -> Result<Cartridge, CliError> {
        let stop = Stop::watch()?;
        let mut report =
            Report::open(self.run_dir.path(), trainer.position().step, trainer.max_steps())?;
        if let Some(questions) = &self.questions {
            let baselines =
                [("teacher", Answerer::Teacher), ("no cartridge", Answerer::NoCartridge)];
            for (name, who) in baselines {
                self.score(questions, name, who, trainer.position().step, &mut report)?;
            }
        }
        self.measure(trainer, &mut report)?;
        self.ask(trainer, &mut report)?;
        let flags = self.flags;
        // Never with 0: there is no update 0 in the loop.
        let due = |every: Option<u64>, step: u64| every.is_some_and(|n| step.is_multiple_of(n));
        let save_every = Some(flags.save_every_n_steps.unwrap_or(100).max(1));
        let mut saved = trainer.position().step;
        while !trainer.is_done() {
            if let Some(code) = stop.asked() {
                return Err(self.stopped(code, trainer, saved, &mut report)?);
            }
            let step = trainer.step()?;
            report.step(&step)?;
            let (step, is_last) = (step.position.step, trainer.is_done());
            if due(save_every, step) || is_last {
                self.run_dir.save(trainer, self.dtype(), self.facts.clone())?;
                saved = step;
            }
            if due(flags.loss_eval_every_n_steps, step) || is_last {
                self.measure(trainer, &mut report)?;
            }
            if due(flags.generate_eval_every_n_steps, step) || is_last {
                self.ask(trainer, &mut report)?;
            }
        }
        report.finish()?;
        let cartridge = self.cartridge(trainer)?;
        println!(
            "{} updates; {} ({} tokens, {} bytes, generation {})",
            trainer.position().step,
            self.run_dir.path().join("cache_last.pt").display(),
            cartridge.tokens(),
            cartridge.bytes(),
            cartridge.generation().short()
        );
        Ok(cartridge)
    }

    /// Saves what is not saved yet, and says how to go on.
    fn stopped(
        &self,
        code: u8,
        trainer: &Trainer,
        saved: u64,
        report: &mut Report,
    ) -> Result<CliError, CliError> {
        let step = trainer.position().step;
        if step > saved {
            self.run_dir.save(trainer, self.dtype(), self.facts.clone())?;
        }
        report.finish()?;
        let (of, path) = (trainer.max_steps(), self.run_dir.path().display());
        let said = format!(
            "stopped after update {step} of {of}, saved in {path}; the same command goes on from there"
        );
        Ok(CliError::Stopped { code, said })
    }

    /// The loss on held-out conversations, if there are any.
    fn measure(&self, trainer: &Trainer, report: &mut Report) -> Result<(), CliError> {
        let step = trainer.position().step;
        let Some(held_out) = &self.held_out else { return Ok(()) };
        if report.has_held_out(step) {
            return Ok(());
        }
        let measured = trainer.measure(&held_out.packs)?;
        report.say(&format!(
            "update {step:>5}  held out      loss {:.4}  perplexity {:.2}  KL {:.4}",
            measured.loss,
            measured.loss.exp(),
            measured.kl
        ));
        report.held_out(step, &held_out.metrics(step, &measured))
    }

    /// Asks the cartridge the held-out questions, if there are any.
    fn ask(&self, trainer: &Trainer, report: &mut Report) -> Result<(), CliError> {
        let Some(questions) = &self.questions else { return Ok(()) };
        let (step, cartridge) = (trainer.position().step, self.cartridge(trainer)?);
        self.score(questions, "cartridge", Answerer::Student(&cartridge), step, report)
    }

    fn score(
        &self,
        questions: &Evaluation,
        name: &str,
        who: Answerer<'_>,
        step: u64,
        report: &mut Report,
    ) -> Result<(), CliError> {
        let score = questions.score(self.runtime, who)?;
        report.say(&format!("update {step:>5}  {name:<12}  {:5.1}% exact answers", 100.0 * score));
        report.write(&Evaluation::metrics(step, who, score))
    }

    fn cartridge(&self, trainer: &Trainer) -> Result<Cartridge, CliError> {
        Ok(trainer.parameters().cartridge(self.dtype(), self.facts.clone())?)
    }

    fn dtype(&self) -> DType {
        match self.flags.save_dtype.unwrap_or_default() {
            SaveDtype::F32 => DType::F32,
            SaveDtype::F16 => DType::F16,
            SaveDtype::Bf16 => DType::BF16,
        }
    }
}
