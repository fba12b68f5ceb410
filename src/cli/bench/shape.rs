//! `cartouche bench --shape`: options of the measurement without a server.

use std::path::{Path, PathBuf};

use clap::Args;

use super::super::{CliError, device};
use super::at_least_1;
use crate::bench::BenchError;
use crate::bench::shape::{self, Part, RoofSizes, Row, ShapePlan, Timing};

/// Options that only concern a server. The key and --out are not among them: the key may come from the
/// environment.
const OF_SERVERS: [&str; 30] = [
    "url",
    "targets",
    "model",
    "endpoint",
    "clients",
    "rates",
    "max_outstanding",
    "requests",
    "seconds",
    "warmup",
    "repeat",
    "timeout",
    "retry_429",
    "prompt_tokens",
    "prompt_file",
    "same_prompt",
    "output_tokens",
    "allow_eos",
    "temperature",
    "seed",
    "extra_body",
    "scenario",
    "prefix",
    "prefix_tokens",
    "cartridge",
    "cartridges_file",
    "cartridge_source",
    "kv_tokens",
    "reserve",
    "raw",
];

#[derive(Debug, Args)]
#[command(next_help_heading = "Without a server")]
pub struct ShapeArgs {
    /// Measure the decoder itself: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or qwen3-4b
    #[arg(long, conflicts_with_all = OF_SERVERS)]
    shape: Option<String>,
    /// auto, cpu, cuda or cuda:N [default: auto: the first GPU if there is one]
    #[arg(long, requires = "shape")]
    device: Option<String>,
    /// Measure the first N layers only, where the whole is too large; nothing is extrapolated
    #[arg(long, requires = "shape", value_parser = at_least_1)]
    layers: Option<usize>,
    /// Measure these only, separated by commas [default: all]
    #[arg(long, requires = "shape", value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Divide all contexts, cartridges and packs, and the default --kv-mib, by N: for slow machines
    #[arg(long, requires = "shape", value_parser = at_least_1)]
    scale: Option<usize>,
    /// MiB of keys and values in `capacity` [default: on a GPU three quarters of what is free, else 1024]
    #[arg(long, requires = "shape")]
    kv_mib: Option<u64>,
    /// Write a small case of training's attention and its gradients as safetensors, to check elsewhere
    #[arg(long, requires = "shape", value_name = "FILE")]
    dump: Option<PathBuf>,
}

impl ShapeArgs {
    pub fn is_wanted(&self) -> bool {
        self.shape.is_some()
    }

    pub fn run(&self, out: Option<&Path>) -> Result<(), CliError> {
        let plan = self.plan()?;
        announce(&plan);
        let mut rows: Vec<Row> = Vec::new();
        let figures = shape::run(&plan, &mut |row| {
            println!("{}", shape::line(row));
            rows.push(row.clone());
            // Again and again, so that a run that is cut off leaves what it had.
            out.map_or(Ok(()), |folder| shape::write(folder, &rows))
        })?;
        match rows.len() - figures {
            0 => println!("all {figures} figures measured"),
            missing => println!("{missing} of {} figures not measured, see above", rows.len()),
        }
        if let Some(folder) = out {
            println!("written: {}/shape.csv", folder.display());
        }
        if let Some(path) = &self.dump {
            shape::dump(path, &plan.config, &plan.placement)?;
            println!("written: {}", path.display());
        }
        Ok(())
    }

    fn plan(&self) -> Result<ShapePlan, CliError> {
        let name = self.shape.clone().unwrap_or_default();
        let mut config = shape::config(&name)?;
        let of_layers = config.layers;
        config.layers = self.layers.unwrap_or(of_layers);
        if config.layers > of_layers {
            let message = format!("--layers {}: {name} has {of_layers}", config.layers);
            return Err(BenchError::Plan(message).into());
        }
        let placement = device::placement(self.device.as_deref().unwrap_or("auto"))?;
        Ok(ShapePlan {
            shape: name,
            config,
            of_layers,
            roofs: RoofSizes::of(&placement.device),
            placement,
            parts: if self.only.is_empty() { Part::ALL.to_vec() } else { self.only.clone() },
            scale: self.scale.unwrap_or(1),
            kv_bytes: self.kv_mib.map(|mib| mib << 20),
            timing: Timing::default(),
        })
    }
}

/// What is about to be measured, and everything in which it is less than the whole.
fn announce(plan: &ShapePlan) {
    let c = &plan.config;
    println!(
        "{}: hidden {}, {} query heads on {} of {}, MLP {}, vocabulary {}; random weights in {}",
        plan.shape,
        c.hidden_size,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.intermediate_size,
        c.vocab_size,
        plan.placement.dtype.as_str(),
    );
    match c.layers == plan.of_layers {
        true => println!("all {} layers", c.layers),
        false => println!(
            "the first {} of {} layers, and the whole head: all times are of these, none is extrapolated",
            c.layers, plan.of_layers
        ),
    }
    if plan.scale > 1 {
        println!("all lengths divided by {}", plan.scale);
    }
    println!(
        "times in ms; predicted: the larger of bytes at the copy's rate and operations at the product's"
    );
    println!("{}", shape::heading());
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;
    use crate::cli::bench::BenchArgs;

    #[test]
    fn every_option_of_servers_is_refused_beside_shape() {
        let names = |command: Command| -> Vec<String> {
            command.get_arguments().map(|arg| arg.get_id().to_string()).collect()
        };
        let own = names(ShapeArgs::augment_args(Command::new("own")));
        let mut servers = names(BenchArgs::augment_args(Command::new("all")));
        servers.retain(|name| !own.contains(name) && name != "out" && name != "api_key");
        let mut listed = OF_SERVERS.map(str::to_owned).to_vec();
        listed.sort();
        servers.sort();
        assert_eq!(servers, listed);
    }
}
