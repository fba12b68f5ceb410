//! Line charts as SVG text. Colours and fonts come from the page's style sheet.

use std::fmt::Write;

use super::table::number;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
/// Room for tick labels and axis titles.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 32.0;
const BOTTOM: f64 = 52.0;
/// Least distance between the labels of the x axis.
const LABEL_GAP: f64 = 32.0;

/// One line.
#[derive(Debug)]
pub struct Series {
    /// In tooltips.
    pub name: String,
    /// Colour and marker.
    pub style: usize,
    pub dashed: bool,
    pub points: Vec<(f64, f64)>,
}

/// Colours that the style sheet has; further series begin again with other markers.
pub const STYLES: usize = 6;

/// A chart with a y axis from 0. `x` are the ticks; they are spaced by ratio if they span more than a
/// factor of four.
pub fn chart(x_title: &str, y_title: &str, x: &[f64], series: &[Series]) -> String {
    let top = series.iter().flat_map(|s| &s.points).map(|p| p.1).fold(0.0, f64::max);
    let ticks = ticks(top);
    let y_max = ticks.last().copied().unwrap_or(1.0);
    let y_at = |y: f64| HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM);
    let scale = XScale::over(x);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">\n\
         <text class=\"axis\" x=\"8\" y=\"16\">{}</text>\n",
        escape(y_title),
        escape(x_title),
        escape(y_title)
    );
    for &tick in &ticks {
        let y = y_at(tick);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            short(tick)
        );
    }
    let base = HEIGHT - BOTTOM;
    let mut last_label = f64::NEG_INFINITY;
    for &tick in x {
        let at = scale.at(tick);
        let _ = write!(
            svg,
            "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{base}\" y2=\"{}\"/>",
            base + 5.0
        );
        if at - last_label >= LABEL_GAP {
            last_label = at;
            let _ = write!(
                svg,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\">{}</text>",
                base + 19.0,
                short(tick)
            );
        }
        svg.push('\n');
    }
    let _ = writeln!(
        svg,
        "<text class=\"axis\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{}\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 10.0,
        escape(x_title)
    );
    for line in series {
        let at: Vec<(f64, f64)> =
            line.points.iter().map(|&(x, y)| (scale.at(x), y_at(y))).collect();
        let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let dash = if line.dashed { " dashed" } else { "" };
        let _ = writeln!(
            svg,
            "<g class=\"c{}{dash}\"><polyline points=\"{}\"/>",
            line.style % STYLES,
            path.join(" ")
        );
        for (&(px, py), &(x, y)) in at.iter().zip(&line.points) {
            let _ = writeln!(
                svg,
                "{}<title>{}: {} at {}</title></path>",
                marker(line.style, px, py),
                escape(&line.name),
                number(Some(y)),
                short(x)
            );
        }
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

/// Where the ticks of the x axis lie.
struct XScale {
    from: f64,
    to: f64,
    by_ratio: bool,
}

impl XScale {
    fn over(x: &[f64]) -> Self {
        let from = x.iter().copied().fold(f64::INFINITY, f64::min);
        let to = x.iter().copied().fold(0.0, f64::max);
        Self { from, to, by_ratio: from > 0.0 && to > 4.0 * from }
    }

    fn at(&self, x: f64) -> f64 {
        // Markers keep clear of the axis.
        let (left, right) = (LEFT + 20.0, WIDTH - RIGHT - 12.0);
        let part = match self.by_ratio {
            _ if self.to <= self.from => 0.5,
            true => (x / self.from).ln() / (self.to / self.from).ln(),
            false => (x - self.from) / (self.to - self.from),
        };
        left + part * (right - left)
    }
}

/// Round numbers from 0 to at least `top`, four to seven of them.
fn ticks(top: f64) -> Vec<f64> {
    if !(top > 0.0 && top.is_finite()) {
        return vec![0.0, 1.0];
    }
    let power = 10_f64.powf((top / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| top / step <= 5.0).unwrap_or(10.0 * power);
    let count = (top / step).ceil() as usize;
    (0..=count).map(|i| i as f64 * step).collect()
}

/// A tick label: no digits that rounding left behind, thousands as `k`.
fn short(value: f64) -> String {
    let trim = |v: f64, unit: &str| {
        let text = format!("{v:.3}");
        format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
    };
    if value >= 10_000.0 { trim(value / 1000.0, "k") } else { trim(value, "") }
}

/// Circle, square, triangle or diamond, so that lines differ without their colours too. The caller closes
/// the element.
fn marker(style: usize, x: f64, y: f64) -> String {
    let d = match style % 4 {
        0 => format!("M{:.1},{y:.1}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", x - 4.0),
        1 => format!("M{:.1},{:.1}h7v7h-7z", x - 3.5, y - 3.5),
        2 => format!("M{x:.1},{:.1}l4.5,8h-9z", y - 5.0),
        _ => format!("M{x:.1},{:.1}l5,5l-5,5l-5,-5z", y - 5.0),
    };
    format!("<path d=\"{d}\">")
}

/// Text as HTML and SVG show it.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ticks_are_few_and_reach_the_top(top in 1e-6..1e9_f64) {
            let ticks = ticks(top);
            prop_assert!((4..=7).contains(&ticks.len()), "{:?}", ticks);
            prop_assert!(ticks[ticks.len() - 1] >= top * (1.0 - 1e-9));
            prop_assert!(ticks[ticks.len() - 2] < top);
        }

        #[test]
        fn points_stay_inside_the_axes(
            mut x in prop::collection::vec(1.0..1000.0_f64, 1..6),
            y in prop::collection::vec(0.0..1e6_f64, 6),
        ) {
            x.sort_by(f64::total_cmp);
            let scale = XScale::over(&x);
            for at in x.iter().map(|&x| scale.at(x)) {
                prop_assert!(LEFT < at && at < WIDTH - RIGHT, "{}", at);
            }
            let points = x.iter().copied().zip(y).collect();
            let series = [Series { name: "a".to_owned(), style: 0, dashed: false, points }];
            let svg = chart("x", "y", &x, &series);
            let line = svg.split("polyline points=\"").nth(1).and_then(|s| s.split('"').next());
            for point in line.unwrap_or_default().split(' ') {
                let y: f64 = point.split_once(',').and_then(|p| p.1.parse().ok()).unwrap();
                prop_assert!((TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(&y), "{}", y);
            }
        }
    }

    #[test]
    fn tick_labels_are_short() {
        let labels = [0.0, 0.1 + 0.2, 1.0, 32.0, 2500.0, 30_000.0].map(short);
        assert_eq!(labels, ["0", "0.3", "1", "32", "2500", "30k"]);
    }
}
