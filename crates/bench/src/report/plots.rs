//! Reports as SVG: bars for a figure of all subjects, lines for what grows.

use anyhow::anyhow;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, IntoSegmentedCoord, LineSeries,
    PathElement, RGBColor, Ranged, Rectangle, SVGBackend, SegmentValue, SeriesLabelPosition, WHITE,
};

use super::table::number;
use super::{FLOOR, Figure, Report};

const SIZE: (u32, u32) = (760, 360);
/// Distinguishable also without colours, by their lightness.
const COLORS: [RGBColor; 7] = [
    RGBColor(120, 120, 120),
    RGBColor(200, 80, 20),
    RGBColor(20, 60, 120),
    RGBColor(60, 120, 180),
    RGBColor(130, 180, 220),
    RGBColor(90, 60, 130),
    RGBColor(170, 170, 170),
];

/// A plot of one figure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plot {
    /// The file's name, without its end.
    pub(crate) file: &'static str,
    pub(crate) figure: &'static str,
    pub(crate) title: &'static str,
    /// What grows to the right; none for bars, of which each subject has one.
    pub(crate) across: Option<&'static str>,
    pub(crate) scale: Scale,
}

/// What is drawn upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    /// By powers of ten.
    Logarithmic,
    /// The ratio to the floor, which is 1: a busy machine is in no ratio.
    Ratio,
}

/// What is drawn of a figure.
struct Shown {
    median: f64,
    low: f64,
    high: f64,
}

impl Plot {
    /// The text of the SVG; none if the report does not have the figure.
    pub(crate) fn draw(&self, report: &Report) -> anyhow::Result<Option<String>> {
        let is_drawn = |f: &&Figure| f.name == self.figure && self.shown(f).is_some();
        let figures: Vec<&Figure> = report.figures.iter().filter(is_drawn).collect();
        if figures.is_empty() {
            return Ok(None);
        }
        let mut text = String::new();
        match self.across {
            None => self.bars(&figures, &mut text)?,
            Some(across) => self.lines(across, report, &figures, &mut text)?,
        }
        Ok(Some(text + "\n"))
    }

    fn shown(&self, figure: &Figure) -> Option<Shown> {
        let (median, low, high) = match (self.scale, &figure.ratio) {
            (Scale::Ratio, Some(ratio)) if ratio.to == FLOOR => {
                (ratio.median, ratio.low, ratio.high)
            }
            (Scale::Ratio, None) if figure.subject == FLOOR => (1.0, 1.0, 1.0),
            (Scale::Ratio, _) => return None,
            _ => (figure.median, figure.low, figure.high),
        };
        Some(Shown { median, low, high })
    }

    fn unit(&self, figures: &[&Figure]) -> &'static str {
        match self.scale {
            Scale::Ratio => "ratio to the floor",
            _ => figures.first().map_or("", |figure| figure.unit.symbol()),
        }
    }

    fn bars(&self, figures: &[&Figure], text: &mut String) -> anyhow::Result<()> {
        let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let shown = figures.iter().filter_map(|figure| self.shown(figure));
        let shown: Vec<Shown> = shown.collect();
        let top = shown.iter().map(|shown| shown.high).fold(0.0, f64::max) * 1.15;
        let names: Vec<&str> = figures
            .iter()
            .map(|figure| figure.subject.as_str())
            .collect();
        let mut chart = ChartBuilder::on(&area);
        let mut chart = chart
            .caption(self.title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(60)
            .build_cartesian_2d(names.as_slice().into_segmented(), 0.0..top)
            .map_err(failed)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_label_formatter(&|place| match place {
            SegmentValue::Exact(name) | SegmentValue::CenterOf(name) => (**name).to_owned(),
            SegmentValue::Last => String::new(),
        });
        mesh.max_light_lines(1)
            .disable_x_mesh()
            .y_desc(self.unit(figures));
        mesh.draw().map_err(failed)?;
        for ((shown, name), color) in shown.iter().zip(&names).zip(COLORS.iter().cycle()) {
            let (left, right) = (SegmentValue::Exact(name), SegmentValue::CenterOf(name));
            let bar = [(left.clone(), 0.0), (right, shown.median)];
            let mut bar = Rectangle::new(bar, color.filled());
            // The right half of its place stays free for the spread.
            bar.set_margin(0, 0, 12, 0);
            chart.draw_series([bar]).map_err(failed)?;
            let spread = vec![
                (SegmentValue::CenterOf(name), shown.low),
                (SegmentValue::CenterOf(name), shown.high),
            ];
            let spread = PathElement::new(spread, color.stroke_width(3));
            chart.draw_series([spread]).map_err(failed)?;
        }
        area.present().map_err(failed)
    }

    fn lines(
        &self,
        across: &str,
        report: &Report,
        figures: &[&Figure],
        text: &mut String,
    ) -> anyhow::Result<()> {
        let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let ats = figures.iter().filter_map(|figure| figure.at).map(to_float);
        let right = ats.fold(1.0, f64::max);
        let shown = || figures.iter().filter_map(|figure| self.shown(figure));
        let values = || shown().map(|shown| shown.median);
        let top = values().fold(0.0, f64::max) * 1.15;
        let bottom = values().filter(|value| *value > 0.0).fold(top, f64::min) / 2.0;
        let chart = Chart {
            plot: self,
            title: across,
            report,
            figures,
        };
        let across = 0.0..right * 1.05;
        if self.scale == Scale::Logarithmic {
            chart.draw(&area, across, (bottom..top * 2.0).log_scale())?;
        } else {
            chart.draw(&area, across, 0.0..top)?;
        }
        area.present().map_err(failed)
    }
}

/// Lines, whatever the axes are.
struct Chart<'a> {
    plot: &'a Plot,
    /// Of what is across.
    title: &'a str,
    report: &'a Report,
    figures: &'a [&'a Figure],
}

type Area<'a> = plotters::drawing::DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

impl Chart<'_> {
    fn draw<X, Y>(&self, area: &Area<'_>, x: X, y: Y) -> anyhow::Result<()>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(area);
        let mut chart = chart
            .caption(self.plot.title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x, y)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .max_light_lines(1)
            .x_desc(self.title)
            .y_desc(self.plot.unit(self.figures))
            .x_label_formatter(&|value| number(*value).trim_end_matches(".00").into())
            .y_label_formatter(&|value| number(*value).trim_end_matches(".00").into())
            .draw()
            .map_err(failed)?;
        for (info, color) in self.report.subjects.iter().zip(COLORS.iter().cycle()) {
            let own = self.figures.iter().filter(|f| f.subject == info.name);
            let points = own.filter_map(|f| Some((to_float(f.at?), self.plot.shown(f)?.median)));
            let points: Vec<(f64, f64)> = points.collect();
            if points.is_empty() {
                continue;
            }
            let line = LineSeries::new(points, color.stroke_width(2));
            let drawn = chart.draw_series(line).map_err(failed)?;
            let sample =
                move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2));
            drawn.label(info.name.clone()).legend(sample);
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperRight);
        labels
            .background_style(WHITE.mix(0.8))
            .border_style(COLORS[0]);
        labels.draw().map_err(failed)
    }
}

fn to_float(number: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of containers or mounts"
    )]
    let number = number as f64;
    number
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot plot: {error}")
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    fn plot(figure: &'static str, across: Option<&'static str>) -> Plot {
        Plot {
            file: "x",
            figure,
            title: "a title",
            across,
            scale: Scale::Linear,
        }
    }

    #[test]
    fn each_subject_has_its_bar_and_its_name() {
        let text = plot("life", None).draw(&example()).unwrap().unwrap();
        for word in ["floor", "ours", "go 1.6", "a title"] {
            assert!(text.contains(word), "{word}");
        }
    }

    #[test]
    fn lines_are_drawn_on_each_scale() {
        for scale in [Scale::Linear, Scale::Logarithmic, Scale::Ratio] {
            let plot = Plot {
                scale,
                ..plot("rate", Some("at once"))
            };
            let text = plot.draw(&example()).unwrap().unwrap();
            assert!(text.contains("polyline") && text.contains("at once"));
        }
    }

    #[test]
    fn the_floor_of_ratios_is_one() {
        let plot = Plot {
            scale: Scale::Ratio,
            ..plot("life", None)
        };
        let report = example();
        let shown = report
            .figures
            .iter()
            .filter_map(|figure| plot.shown(figure));
        let [floor, ours, ..] = shown.map(|shown| shown.median).collect::<Vec<_>>()[..] else {
            panic!("too few figures");
        };
        assert!(
            (0.99..1.01).contains(&floor) && ours > 1.1,
            "{floor} {ours}"
        );
        // No ratio of what the floor does not have.
        let calls = self::plot("counts/calls/shim", None);
        let scale = Scale::Ratio;
        assert_eq!(Plot { scale, ..calls }.draw(&report).unwrap(), None);
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        assert_eq!(plot("absent", None).draw(&example()).unwrap(), None);
    }
}
