// Helm's own chart loader, values, schema check, template engine and linter,
// without what talks to clusters and registries. It understands the part of
// helm's command line that the scenario kubernetes_chart uses, so that a whole
// helm can stand in for it:
//
//	helm template NAME CHART [flags]    the chart's objects, as YAML
//	helm lint CHART [flags]             what helm has to say about the chart
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"
	"helm.sh/helm/v4/pkg/engine"
	"helm.sh/helm/v4/pkg/strvals"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 3 && args[0] == "template":
		options, err := parse(args[3:])
		if err != nil {
			return err
		}
		return template(args[1], args[2], options)
	case len(args) >= 2 && args[0] == "lint":
		options, err := parse(args[2:])
		if err != nil {
			return err
		}
		return check(args[1], options)
	}
	return errors.New("usage: helm template NAME CHART [flags] | helm lint CHART [flags]")
}

type options struct {
	namespace string
	strict    bool
	values    map[string]any
}

func parse(args []string) (options, error) {
	var files, jsons, sets []string
	list := func(to *[]string) func(string) error {
		return func(value string) error {
			*to = append(*to, value)
			return nil
		}
	}
	options := options{values: map[string]any{}}
	flags := flag.NewFlagSet("helm", flag.ContinueOnError)
	flags.StringVar(&options.namespace, "namespace", "default", "the release's namespace")
	flags.BoolVar(&options.strict, "strict", false, "lint: warnings are errors")
	flags.Func("values", "file with values", list(&files))
	flags.Func("set", "value in helm's own language", list(&sets))
	flags.Func("set-json", "value as JSON", list(&jsons))
	if err := flags.Parse(args); err != nil {
		return options, err
	}
	if flags.NArg() > 0 {
		return options, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	// In the order in which helm lays them over each other.
	for _, name := range files {
		file, err := os.Open(name)
		if err != nil {
			return options, err
		}
		values, err := loader.LoadValues(file)
		file.Close()
		if err != nil {
			return options, fmt.Errorf("failed to parse %s: %w", name, err)
		}
		options.values = loader.MergeMaps(options.values, values)
	}
	for _, value := range jsons {
		if err := strvals.ParseJSON(value, options.values); err != nil {
			return options, fmt.Errorf("failed parsing --set-json data %s: %w", value, err)
		}
	}
	for _, value := range sets {
		if err := strvals.ParseInto(value, options.values); err != nil {
			return options, fmt.Errorf("failed parsing --set data: %w", err)
		}
	}
	return options, nil
}

func template(name, dir string, options options) error {
	chart, err := loader.Load(dir)
	if err != nil {
		return err
	}
	caps := common.DefaultCapabilities
	if version := chart.Metadata.KubeVersion; version != "" && !chartutil.IsCompatibleRange(version, caps.KubeVersion.String()) {
		return fmt.Errorf("chart requires kubeVersion: %s which is incompatible with Kubernetes %s", version, caps.KubeVersion.String())
	}
	if err := chartutil.ProcessDependencies(chart, options.values); err != nil {
		return err
	}
	release := common.ReleaseOptions{Name: name, Namespace: options.namespace, Revision: 1, IsInstall: true}
	values, err := util.ToRenderValues(chart, options.values, release, caps)
	if err != nil {
		return err
	}
	files, err := new(engine.Engine).RenderWithContext(context.Background(), chart, values)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		text := strings.TrimSpace(files[name])
		// Notes are for the person who installs.
		if text == "" || path.Base(name) == "NOTES.txt" {
			continue
		}
		fmt.Printf("---\n# Source: %s\n%s\n", name, text)
	}
	return nil
}

func check(dir string, options options) error {
	result := lint.RunAll(dir, options.values, options.namespace)
	for _, message := range result.Messages {
		fmt.Println(message.Error())
	}
	limit := support.ErrorSev
	if options.strict {
		limit = support.WarningSev
	}
	if result.HighestSeverity >= limit {
		return errors.New("1 chart(s) linted, 1 chart(s) failed")
	}
	return nil
}
